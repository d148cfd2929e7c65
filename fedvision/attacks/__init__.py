"""What malicious sites do, to measure the defence: their data, updates and lies. No honest site uses it."""
