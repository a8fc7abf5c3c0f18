"""What is measured: reconstructions, scores, baselines, results and their report."""
