"""Every shipped YAML and every make target, really run on tiny parts: `make smoke`. A short version is a test."""
