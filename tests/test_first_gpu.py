"""`benchmarks/first_gpu.py`, as far as it can be tried without a GPU."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import first_gpu


def test_kernels_of_attention_are_found_by_the_names_that_an_h100_gave():
    memory_efficient = "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<"
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::"
    others = "nvjet_sm90_tst_64x80_64x11_2x4_h_bz_bias_TNT", "void at::native::(anonymous namespace)::CatArrayBatched"
    found = ["fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "void pytorch_flash::flash_fwd_kernel"]
    assert first_gpu.attention_kernels([memory_efficient, *others, flash, flash]) == found
