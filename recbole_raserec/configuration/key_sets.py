"""Names of options by what they are for: of the run, of RecBole alone, computed, without a say in the training."""

from __future__ import annotations

#: Options of the run, not of a model: how it is started.
RUN_KEYS = frozenset(
    [
        "model",
        "dataset",
        "config_files",
        "nproc",
        "ip",
        "port",
        "world_size",
        "group_offset",
        "verbose",
    ]
)

#: Options that RecBole 1.2.1 reads, whatever the model, without listing them in a YAML file or argument list.
UNLISTED_KEYS = frozenset(["encoding", "tail_ratio", "token_num_threshold", "xgb_early_stopping_rounds"])

#: The same, read by one model's code alone (or, eta, by one transform).
UNLISTED_MODEL_KEYS = frozenset(["cin", "contrast", "eta", "feature_num", "has_residual", "norm", "sim", "use_filter"])

#: Options of RecBole's sequence transforms; read when `transform` is set.
TRANSFORM_KEYS = frozenset(["beta", "eta", "ft_ratio", "mask_ratio"])

#: Entries RecBole computes and overwrites; a value given for one would be lost in silence.
COMPUTED_KEYS = frozenset(
    [
        "MODEL_TYPE",
        "MODEL_INPUT_TYPE",
        "collaborative_options",
        "eval_type",
        "device",
        "local_rank",
        "offset",
        "single_spec",
        "valid_neg_sample_args",
        "test_neg_sample_args",
        "CROP_ITEM_SEQ",
        "CROP_ITEM_SEQ_LEN",
        "INVERSE_ITEM_SEQ",
        "MASK_INDEX",
        "MASK_ITEM_SEQ",
        "NEG_ITEMS",
        "POS_ITEMS",
        "REORDER_ITEM_SEQ",
    ]
)

#: What to write instead of a name that RecBole once had, or computes.
REMEDIES = {
    "device": "set gpu_id, or use_gpu: false for the CPU",
    "local_rank": "set nproc, the runner numbers the processes",
    "offset": "set group_offset",
    "neg_sampling": "set train_neg_sample_args",
    "training_neg_sample_num": "set train_neg_sample_args",
    "eval_setting": "set eval_args",
}

#: Options that leave the trained weights as they are.
NOT_TRAINING = (
    RUN_KEYS
    | COMPUTED_KEYS
    | frozenset(
        [
            "cache_neighbours",
            "data_path",
            "checkpoint_dir",
            "backbone_checkpoint",
            "result_file",
            "ranks_file",
            "resume",
            "threads",
            "gpu_id",
            "use_gpu",
            "worker",
            "show_progress",
            "state",
            "log_wandb",
            "wandb_project",
            "save_dataset",
            "dataset_save_path",
            "save_dataloaders",
            "dataloaders_save_path",
            "config_file",
            "eval_batch_size",
            "eval_memory_mb",
            "topk",
            "metrics",
            "metric_decimal_place",
            "loss_decimal_place",
        ]
    )
) - {"model", "dataset"}
