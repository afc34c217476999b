"""What one does with runs that were made: reports, predictions, layer reports."""
