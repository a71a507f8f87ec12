"""Has Diffusers say what is wrong with the files of a converted model; see ``damaged``."""

from diffusers.models import modeling_utils

from omni_convert.runtime.damaged import explain

explain(modeling_utils, "load_state_dict", 0)
explain(modeling_utils, "_get_checkpoint_shard_files", 1)
