"""The paired sweep over PRe's settings, and its report."""
