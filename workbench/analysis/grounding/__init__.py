"""Grounding: from an answer's token to the pictures, tiles and patches that its heads read."""

from workbench.analysis.grounding.places import image_places
from workbench.analysis.grounding.pointing import Pointing, pointing
from workbench.analysis.grounding.reading import grounding, grounding_of
from workbench.analysis.grounding.result import Grounding
from workbench.analysis.grounding.tiles import ImagePlaces, Picture, Tile
from workbench.analysis.grounding.words import word_grounding

__all__ = ["Grounding", "ImagePlaces", "Picture", "Pointing", "Tile", "grounding", "grounding_of", "image_places",
           "pointing", "word_grounding"]  # fmt: skip
