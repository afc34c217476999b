"""Images and labels: reading, splitting, sampling and augmenting them."""
