"""What every floor may use: errors, safe file writing, memory, small helpers."""
