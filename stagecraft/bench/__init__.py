"""Seconds a step on this machine, beside what peers take for the same work."""
