"""Plumbing: what a run needs around the method, from flags to files."""
