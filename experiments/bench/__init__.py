"""What training, sampling and starting cost on this machine, measured side by side: `make bench`."""
