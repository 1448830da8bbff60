"""Needle-driven evolutionary search for RoPE factors."""
