"""The digit scenes: drawn, asked about, packed into batches."""
