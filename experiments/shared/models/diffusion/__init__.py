"""Diffusion models in continuous time: networks of images and labels, their training and sampling."""
