"""The paired experiment: what PRe changes, over seeds, and its report."""
