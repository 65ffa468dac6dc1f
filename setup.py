import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "plaintrain/__init__.py").read_text())[1]

PLOT = ["matplotlib>=3.8"]
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

setup(
    name="plaintrain",
    version=version,
    description="Plain-loop training scripts for object detection",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # It makes an editable install a path entry. The import hook that setuptools uses otherwise is asked after
    # the folder of the script, where a clone called plaintrain is taken for a namespace package.
    package_dir={"": "."},
    packages=find_packages(include=["plaintrain", "plaintrain.*"]),
    package_data={
        "plaintrain": ["py.typed"],
        "plaintrain.report": ["report.css", "report.js", "report.html.jinja"],
        "plaintrain.visualization": ["plots.mplstyle"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "numpy>=2.0",
        "pyyaml>=6.0",
        "yacs>=0.1.8",
        "pycocotools>=2.0.8",
        "tensorboardX>=2.6.2.2",
        "pillow>=10.3",
        "tqdm>=4.66",
        "jinja2>=3.1",
    ],
    extras_require={
        "fast": ["hotcoco>=1.3"],
        "plot": PLOT,
        "export": EXPORT,
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "hotcoco>=1.3",
            "faster-coco-eval>=1.8",
            "selenium>=4.20",
            *PLOT,
            *EXPORT,
        ],
        "dev": ["ruff>=0.14", "mypy>=1.18"],
    },
)
