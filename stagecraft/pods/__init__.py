"""Before a pod and on the way to it: what a run would need there, and its manifest."""
