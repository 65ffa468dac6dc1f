"""Drawings of images with boxes, and plots."""
