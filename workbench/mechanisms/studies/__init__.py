"""Studies: mechanisms that text and images do not suit, each trained on generated data of its own kind.

A study has forms that are compared, such as with a gate and without, and says what is seen of the trained model.
`benchmarks/studies.py` trains them and says what follows for the papers' claims.

>>> from workbench.mechanisms import studies
>>> sorted(studies.studies())
['control_aided', 'csa', 'medusa', 's2snet', 'spikformer']
"""

from workbench.mechanisms.studies import (  # they put themselves into the list
    actions,
    crystals,
    driving,
    lesions,
    spiking,
)
from workbench.mechanisms.studies.exhibit import Atoms, Bars, Exhibit, Heat, Lines
from workbench.mechanisms.studies.shipped import file_of, load, read_runs, runs, save, studied, studies, study
from workbench.mechanisms.studies.study import Phase, Studied, Study, run

__all__ = [
    "Atoms", "Bars", "Exhibit", "Heat", "Lines", "Phase", "Studied", "Study", "actions", "crystals", "driving",
    "file_of", "lesions", "load", "read_runs", "run", "runs", "save", "spiking", "studied", "studies", "study",
]  # fmt: skip
