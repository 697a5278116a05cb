"""Pages and endpoints that a run serves on this machine."""
