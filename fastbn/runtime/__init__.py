"""From tensors to kernel launches: checks, plans, memory and launchers."""
