"""Images and labels: where they come from, how they are split, drawn and augmented."""
