"""Packaging of hacl_llava. Bounds are what CI runs (4.37.2, 4.57, 5.x of transformers) or what the code needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hacl_llava/__init__.py").read_text()).group(1)

# LLaVA's last commit: the same 1.2.2.post1 as the tag v1.2.2.post1, whose pins (torch 2.0.1, transformers 4.36.2) are
# below what works here; this commit pins torch 2.1.2 and transformers 4.37.2.
LLAVA = "llava[train] @ git+https://github.com/haotian-liu/LLaVA.git@c121f0432da27facab705978f83c4ada465e46fd"

setup(
    name="hacl_llava",
    version=VERSION,
    description="HACL for LLaVA: hallucination augmented contrastive learning in stage-1 pretraining, by one flag",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hacl_llava", "hacl_llava.*"]),
    package_data={
        "hacl_llava.common": ["templates/*.j2"],
        "hacl_llava.hallucinate": ["vocabulary.txt", "wordnet.json.gz", "WORDNET_LICENSE"],
        "hacl_llava.evaluation": ["coco_synonyms.txt"],
        "hacl_llava.miniature": ["pretrained/*", "pretrained/*/*"],
    },
    python_requires=">=3.10",  # LLaVA's own stack runs on 3.10; the tests on 3.11
    install_requires=[
        "torch>=2.1",  # scaled_dot_product_attention with a mask, as transformers calls it
        "transformers>=4.37.2,<6",  # LLaVA's own, up to the major version that CI runs
        "accelerate>=0.21",  # the Trainer needs it; 4.37.2 goes with accelerate < 1.0
        "deepspeed>=0.12.6",  # the engine; LLaVA's own pin is the floor
        "peft",  # llava.train imports it for LoRA; 4.37.2 goes with peft < 0.13
        "sentencepiece>=0.1.99",  # Llama's slow tokenizer
        "protobuf",  # transformers reads tokenizer.model with it
        "einops>=0.6.1",  # LLaVA's stack has it; its MPT model imports it
        "safetensors>=0.4",  # the heads' file
        "pyyaml",  # the prompt file; transformers brings it
        "filelock",  # one run at a time in a folder; torch brings it
        "pillow",  # LLaVA's dataset, the miniature's renderer
        "requests",  # llava.mm_utils and llava.utils import it
        "numpy",
        "jinja2",  # reports and model cards; torch brings it
        "scipy>=1.10",  # intervals and exact tests
        "tqdm",
    ],
    extras_require={
        "llava": [LLAVA],
        "api": [
            "openai>=1.56"
        ],  # endpoints: hallucinated captions, judges, reference models; the oldest that was tried
        "plot": ["matplotlib>=3.7", "scikit-learn>=1.3"],  # pictures of reports; analysis of representations
        "quantize": ["bitsandbytes>=0.43"],  # 4- and 8-bit loading, QLoRA
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.6",
            "build",
            "openai>=1.56",
            "matplotlib>=3.7",
            "scikit-learn>=1.3",
        ],
    },
    entry_points={
        "console_scripts": ["hacl-llava=hacl_llava.cli:main"],
        "lmms_eval.models": ["hacl_llava=hacl_llava.evaluation.lmms:manifest"],  # docs/evaluation.md
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
