"""Slices inside modules that are no linear layers."""
