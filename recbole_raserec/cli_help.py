"""What ``recbole-raserec --help`` and ``recbole-raserec COMMAND --help`` print."""

from __future__ import annotations

USAGE = """\
usage: recbole-raserec [run] --model=MODEL --dataset=DATASET [--OPTION=VALUE ...]
       recbole-raserec prepare --input=FILE --format=FORMAT --output=DIR --name=NAME
       recbole-raserec regenerate --dataset=DATASET --output=DIR [--OPTION=VALUE ...]
       recbole-raserec compare --models=MODEL,MODEL --datasets=DATASET,... --output=DIR [--OPTION=VALUE ...]
       recbole-raserec tune --model=MODEL --dataset=DATASET --output=DIR [--OPTION=VALUE ...]
       recbole-raserec recommend DIR --items=IDS [--k=N]
       recbole-raserec explain DIR --items=IDS [--k=N]
       recbole-raserec serve DIR [--port=N] [--token_file=FILE]
       recbole-raserec doctor
       recbole-raserec --version

  run         train and evaluate a model (the default)
  prepare     turn raw data into the atomic files that `run` reads
  regenerate  regenerate a training set (DR4SR) and write it as atomic files
  compare     models against each other over data sets and seeds, with significance
  tune        search options by their validation figures (needs the extra `tune`)
  recommend   the best items for a history, from the checkpoint of a finished run
  explain     why these: the memories behind each recommended item
  serve       answer over HTTP, and take up new interactions
  doctor      report the installation, and test it in ten seconds

`recbole-raserec COMMAND --help` lists the options of a command."""

RUN_HELP = """\
usage: recbole-raserec run --model=MODEL --dataset=DATASET [--OPTION=VALUE ...]

Trains a model and prints its test figures, under both protocols (items of the history kept in the ranking, and
removed). RaSeRec trains its backbone first, or reuses it, and is compared with it. The same command continues an
interrupted run from the last finished epoch.

  -m, --model=NAME           RaSeRec, SASRec, DuoRec, BSARec, DARec, or any of RecBole
  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --config_files="A B"       YAML files, later ones win over earlier ones

Every option of RecBole can be given as --OPTION=VALUE and wins over the files. Those that matter most:

  --data_path=DIR            directory that contains NAME/NAME.inter
  --backbone=NAME            RaSeRec: a sequential model of this package or of RecBole
  --backbone_checkpoint=DIR  RaSeRec: use this trained backbone instead of training one
  --top_k=N --alpha=X        RaSeRec: neighbours retrieved; weight of the backbone's own vector, 0 to 1
  --epochs=N                 largest number of training epochs
  --MAX_ITEM_LIST_LENGTH=N   the model sees the last N items of a history
  --seed=N
  --nproc=N                  processes that share every batch; world_size, ip, port, group_offset: several machines
  --checkpoint_dir=DIR       where results of finished and unfinished stages are kept
  --result_file=FILE         write the figures as JSON"""

REGENERATE_HELP = """\
usage: recbole-raserec regenerate --dataset=DATASET --output=DIR [--name=NAME] [--OPTION=VALUE ...]

Mines the patterns of the training split, trains the regenerator on them, lets it write new ones, and puts all of it
behind the original rows: DIR/NAME/NAME.train.inter, with .valid.inter, .test.inter, NAME.yaml (the options under which
RecBole alone reads them) and a report. The same command continues an interrupted run.

  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --output=DIR               directory of data sets to write into
  --name=NAME                of the new data set (default: DATASET-regenerated)
  --regen_gamma=X            share of steps that choose among a sequence's own items, 0 to 1
  --regen_conditions=N       patterns written for a sequence
  --regen_...                the others stand, with a comment each, in properties/overall.yaml
  --data_path, --seed, --checkpoint_dir, --threads, --config_files as of `recbole-raserec run`"""

COMPARE_HELP = """\
usage: recbole-raserec compare --models=SPEC,SPEC,... --datasets=NAME,... --output=DIR [--OPTION=VALUE ...]

Runs every model on every data set with every seed, each in a process of its own, and writes tables with mean, standard
deviation, improvement over the base, significance, time and memory: DIR/compare.json, .txt, .md, .tex, .csv, and .png
with matplotlib. What is finished is not run again: the same command continues an interrupted comparison.

  --models=SPEC,...    NAME[:key=value[:key=value...]], a model and its own options (RaSeRec:backbone=SASRec:top_k=10);
                       ; does what : does, in quotes
  --datasets=NAME,...  folders under data_path, or ml-100k
  --seeds=N            how many, from 2020 on (default: 5); with a comma a list of seeds: 2020,2021 or 2020,
  --output=DIR         directory of cells, tables and figures; one protocol each
  --jobs=N             cells to run at a time (default: 1), each with its part of the cores unless --threads is given
  --format=FORMAT      what is printed: text (default), markdown, latex, csv or json

Any option of `recbole-raserec run` holds for all models, as --OPTION=VALUE or in --config_files."""

PREPARE_HELP = """\
formats:
  sequences  one user a line, `user item item ...` in the order of time
  ratings    a table, one interaction a line: user, item, rating, time. Separator and header are recognised;
             columns are found by the usual names, or are 1 to 4, or what the --..._col options say
  amazon     Amazon reviews of 2014, 2018 or 2023, one JSON object a line

examples:
  recbole-raserec prepare --input=reviews_Beauty_5.json.gz --format=amazon --output=dataset --name=amazon-beauty
  recbole-raserec prepare --input=ratings.dat --format=ratings --output=dataset --name=ml-1m --k_core=5
  recbole-raserec prepare --input=log.csv --format=ratings --user_col=uid --item_col=sku --time_col=when \\
      --rating_col=none --output=dataset --name=shop"""

TUNE_HELP = """\
usage: recbole-raserec tune --model=MODEL --dataset=DATASET --output=DIR [--trials=N] [--OPTION=VALUE ...]

Searches options by the validation metric, with Optuna (pip install 'recbole-raserec[tune]'), and reports the test
figures of the best trial alone. The same command continues an interrupted search; after its end it prints the result
again.

  -m, --model=NAME           RaSeRec, DuoRec, SASRec, or any model of RecBole (then with --space)
  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --output=DIR               the study lives there; DIR/best.yaml is for `run --config_files=DIR/best.yaml`
  --trials=N                 in all (default: 30; --sampler=grid: every combination)
  --space=FILE               YAML file of the options to search, or one of RaSeRec, SASRec, DuoRec (the defaults of
                             these models), regeneration; an option given here is not searched
  --sampler=NAME             tpe (the default), random, grid or gp
  --pruner=NAME              median (the default), halving or none: ends hopeless trials early
  --OPTION=VALUE             as of `recbole-raserec run`, for every trial"""
