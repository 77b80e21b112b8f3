"""`superoffload export`: a checkpoint as a Hugging Face model folder."""

from pathlib import Path

import click

from superoffload import cli


@click.command("export")
@click.argument("checkpoint_or_output_dir", type=cli.UserPath(path_type=Path))
@click.argument("target", type=cli.UserPath(path_type=Path))
@click.option("--dtype", default="bfloat16", show_default=True, help="Weight dtype: bfloat16, float32 or float16.")
@click.option("--max_shard_size", default="5GB", show_default=True, help="Maximum size of a weight file.")
@click.option("--trust_checkpoint", is_flag=True, help="Load files that could run code, e.g. of other programs.")
@click.option("--trust_remote_code", is_flag=True, help="Run code that the model brings along; read it first.")
def command(checkpoint_or_output_dir: Path, target: Path, dtype: str, max_shard_size: str, **trust: bool) -> None:
    """Export a checkpoint as a Hugging Face model folder.

    The first argument is the folder of one checkpoint (OUTPUT_DIR/global_stepN), or the output folder of a run, whose
    latest checkpoint is used. TARGET is a new folder, which transformers, vLLM and others can load.
    """
    from superoffload import log
    from superoffload.checkpoint.trust import Trust
    from superoffload.export import weights

    log.setup("INFO")
    trusted = Trust(files=trust["trust_checkpoint"], code=trust["trust_remote_code"])
    weights.export(checkpoint_or_output_dir, target, dtype, max_shard_size, trusted)
