"""What pyproject.toml cannot say: the optional compiled library (see `hardy.nn.compiled` and `hardy.optim.compiled`)."""

import glob

from setuptools import Extension, setup

# No debug information: it is half a megabyte. Products and sums may be fused; NaN and infinity stay what they are.
OPTIONS = "-std=c++17 -O3 -g0 -ffp-contract=fast -fvisibility=hidden -Wno-psabi -pthread"

setup(
    ext_modules=[
        Extension(
            "hardy._compiled",
            sources=["src/hardy/nn/_recurrence.cpp", "src/hardy/optim/_upgd.cpp"],
            depends=sorted(glob.glob("src/hardy/**/*.h", recursive=True)),
            extra_compile_args=OPTIONS.split(),
            extra_link_args=["-pthread"],
            # Without a compiler that can, Hardy installs all the same, and PyTorch's kernels do the work.
            optional=True,
        )
    ]
)
