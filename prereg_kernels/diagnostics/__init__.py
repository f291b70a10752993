"""The checkup: measures of how much of the image the hidden states of an MLLM still hold."""

from prereg_kernels.diagnostics.features import visual_features
from prereg_kernels.diagnostics.probe import linear_probe
from prereg_kernels.diagnostics.spectrum import Spectrum, spectrum
from prereg_kernels.diagnostics.structure import PatchStructure, patch_structure

__all__ = [
    "PatchStructure",
    "Spectrum",
    "linear_probe",
    "patch_structure",
    "spectrum",
    "visual_features",
]
