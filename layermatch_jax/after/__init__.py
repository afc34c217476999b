"""Reports, predictions and layer reports of existing runs."""
