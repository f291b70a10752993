# SPDX-License-Identifier: Apache-2.0
"""The checkup: measures of how much of the image the hidden states of an MLLM still hold."""

# Before the function of the same name, which the module's first import would replace
import prereg_kernels.checkup.report  # noqa: F401
from prereg_kernels.checkup.batches import Batch, ImageFacts
from prereg_kernels.checkup.features import visual_features
from prereg_kernels.checkup.images.patches import TokenGrid
from prereg_kernels.checkup.measures.lens import Lens, LensSums, TopToken, logit_lens
from prereg_kernels.checkup.measures.mean import MeanSums
from prereg_kernels.checkup.measures.norms import MassiveDimension, Norms, NormSums, token_norms
from prereg_kernels.checkup.measures.pooled import pool
from prereg_kernels.checkup.measures.probe import NoProbeError, Probe, linear_probe, probe
from prereg_kernels.checkup.measures.similarity import Similarity, SimilaritySums, similarity
from prereg_kernels.checkup.measures.spectrum import Spectrum, SpectrumSums, spectrum
from prereg_kernels.checkup.measures.structure import PatchStructure, StructureSums, patch_structure
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.run import checkup, report

__all__ = [
    "Batch",
    "CheckupResults",
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
