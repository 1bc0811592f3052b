"""One file, one experiment that claims a result."""
