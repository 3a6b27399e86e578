"""Turns calls with tensors into kernel launches: checks, plans, memory and launchers."""
