"""The checkup: measures of how much of the image the hidden states of an MLLM still hold."""

from prereg_kernels.diagnostics.batches import Batch, ImageFacts
from prereg_kernels.diagnostics.checkup import checkup, report
from prereg_kernels.diagnostics.features import visual_features
from prereg_kernels.diagnostics.lens import Lens, LensSums, TopToken, logit_lens
from prereg_kernels.diagnostics.mean import MeanSums
from prereg_kernels.diagnostics.norms import MassiveDimension, Norms, NormSums, token_norms
from prereg_kernels.diagnostics.patches import TokenGrid
from prereg_kernels.diagnostics.pool import pool
from prereg_kernels.diagnostics.probe import NoProbeError, Probe, linear_probe, probe
from prereg_kernels.diagnostics.similarity import Similarity, SimilaritySums, similarity
from prereg_kernels.diagnostics.spectrum import Spectrum, SpectrumSums, spectrum
from prereg_kernels.diagnostics.structure import PatchStructure, StructureSums, patch_structure

__all__ = [
    "Batch",
    "ImageFacts",
    "Lens",
    "LensSums",
    "MassiveDimension",
    "MeanSums",
    "NoProbeError",
    "NormSums",
    "Norms",
    "PatchStructure",
    "Probe",
    "Similarity",
    "SimilaritySums",
    "Spectrum",
    "SpectrumSums",
    "StructureSums",
    "TokenGrid",
    "TopToken",
    "checkup",
    "linear_probe",
    "logit_lens",
    "patch_structure",
    "pool",
    "probe",
    "report",
    "similarity",
    "spectrum",
    "token_norms",
    "visual_features",
]
