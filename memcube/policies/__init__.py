"""What stays where: pure decisions, without clock and I/O."""
