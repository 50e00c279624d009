"""What pyproject.toml cannot say: the optional compiled LSTM (see `hardy.nn.compiled`)."""

from setuptools import Extension, setup

# No debug information: it is half a megabyte. Products and sums may be fused; NaN and infinity stay what they are.
OPTIONS = "-std=c++17 -O3 -g0 -ffp-contract=fast -fvisibility=hidden -Wno-psabi -pthread"

setup(
    ext_modules=[
        Extension(
            "hardy.nn._recurrence",
            sources=["src/hardy/nn/_recurrence.cpp"],
            depends=["src/hardy/nn/_recurrence_kernel.h"],
            extra_compile_args=OPTIONS.split(),
            extra_link_args=["-pthread"],
            # Without a compiler that can, Hardy installs all the same, and PyTorch's kernels do the work.
            optional=True,
        )
    ]
)
