"""What pyproject.toml cannot say: the optional compiled libraries (see `hardy.nn.compiled` and `hardy.optim.compiled`)."""

import glob

from setuptools import Extension, setup

# No debug information: it is half a megabyte. Products and sums may be fused; NaN and infinity stay what they are.
OPTIONS = "-std=c++17 -O3 -g0 -ffp-contract=fast -fvisibility=hidden -Wno-psabi -pthread"
LIBRARIES = {"nn": "_recurrence", "optim": "_upgd"}

setup(
    ext_modules=[
        Extension(
            f"hardy.{package}.{name}",
            sources=[f"src/hardy/{package}/{name}.cpp"],
            depends=sorted(glob.glob(f"src/hardy/{package}/{name}_*.h")),
            extra_compile_args=OPTIONS.split(),
            extra_link_args=["-pthread"],
            # Without a compiler that can, Hardy installs all the same, and PyTorch's kernels do the work.
            optional=True,
        )
        for package, name in LIBRARIES.items()
    ]
)
