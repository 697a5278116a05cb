"""The steps of training: each kind of stage as a batch, a prepare and an update."""
