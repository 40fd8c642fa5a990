"""Captures that lie on the disk: written forward by forward, read part by part."""
