"""What is shown: the page of a run, runs side by side, the terminal."""
