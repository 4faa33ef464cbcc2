"""Topic 10 - Pretraining LLMs: from dirty text to a language model in a folder that every library loads.

python 10-pretraining-llms/pretraining_llms.py                  # a small pipeline from end to end, two minutes
python 10-pretraining-llms/pretraining_llms.py pretrain         # the course model, ten minutes on two cores
python 10-pretraining-llms/pretraining_llms.py examine          # what the committed course model is worth
torchrun --nproc-per-node 2 10-pretraining-llms/pretraining_llms.py pretrain   # data parallel
"""

from course_model import (
    CheckpointConfig,
    ExamConfig,
    GenerateConfig,
    ModelSizes,
    PretrainConfig,
    SourceConfig,
    examine_folder,
    generate,
    pretrain,
    shards,
)
from shards import ShardConfig
from workbench import RunConfig, run_verbs


def main(argv: list[str] | None = None) -> None:
    verbs = {
        "pretrain": (pretrain, ModelSizes, SourceConfig, PretrainConfig, ExamConfig, RunConfig),
        "examine": (examine_folder, CheckpointConfig, ExamConfig, RunConfig),
        "generate": (generate, CheckpointConfig, GenerateConfig, RunConfig),
        "shards": (shards, ShardConfig, RunConfig),
    }
    run_verbs(__doc__, verbs, argv)


if __name__ == "__main__":
    main()
