"""What the checkup measures on hidden states, a file a measure."""
