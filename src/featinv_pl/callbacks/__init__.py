"""What happens around the steps: scores, pictures, shards, files, progress."""
