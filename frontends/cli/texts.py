"""Every help text of the command line."""

APP = """Train, compress and deploy CNNs that are sparse in the spatial and in the Winograd domain at once.

Exit codes: 0 done; 1 the input or the environment is at fault, one line on standard error says what; 2 wrong usage."""

DEMO = "Fine-tune, compress, compile and run CT-SRCNN on photographs; prints one table. A few minutes."
TRAIN = "Train by a recipe; leaves the weights, the measured results and, quantised, one .jsm file in a folder."
COMPRESS = "Prune, quantise and code a model into one .jsm file."
DECOMPRESS = "Turn a .jsm file into ONNX."
INSPECT = "Say what a .jsm file holds: per layer, shape, sparsity in both domains, bits per weight, bytes."
COMPILE = "Compile a .jsm or .onnx model into TVM's package format; tvmc run takes it too."
RUN = "Run a compiled package on this machine."
BENCH = "Measure a model's sparse builds on this machine against TVM's dense one and other engines."

VERBOSE = "Show the traceback of a failure, and what TVM logs."
VERSION = "Print the version and stop."
JSON = "Print JSON on standard output and nothing else there; docs/cli.md lists the keys."
OUTPUT_DIR = "Folder for the results, made where missing."
OUTPUT_FILE = "File to write; replaced only when the work has succeeded."

RECIPE = "A recipe in TOML, or the name of one that ships with the package."
DATA = "Folder or archive with the data that the recipe names."
RESUME = "Go on from the last checkpoint in the output folder; where the run has finished, print its results."
SET = "Change a value of the recipe; may be repeated."
PROCESSES = "Processes that share every batch."
WEIGHTS = "Weights to start from, a state dict: .safetensors or .pt."

MODEL_TO_COMPRESS = "Model to compress: .onnx, .safetensors or .pt."
SPATIAL_SPARSITY = "Share of the weights to prune in the spatial domain, by magnitude."
WINOGRAD_SPARSITY = "Share of the weights to prune in the Winograd domain; fixes the threshold that the file carries."
STEP = "Quantisation step of all layers, in units of the weights; 0 keeps the weights exact."
BITS = "A step for each layer such that its largest weight takes the largest code of B bits; 8 if nothing is said."
DITHER = "Quantise with a dither known to the decoder, so that the error does not depend on the weights."
SEED = "Seed of the dither."
TILE = "Winograd output tile size, 2 or 4, for --winograd-sparsity."
NETWORK = "The project's network that weights alone (.safetensors, .pt) belong to, such as ct-srcnn."
NETWORK_SET = "An option of --network, as under network.options in a recipe; may be repeated."
INPUT_SHAPES = "Shapes of inputs with open axes: 'NAME:[1,3,224,224]', several with spaces between, one without a name."

JSM = "A .jsm file."
MODEL_TO_COMPILE = "Model to compile: .jsm or .onnx."
TARGET = "TVM target: a string such as 'llvm -mcpu=skylake-avx512', inline JSON, or the path of a JSON file."
CROSS_COMPILER = "C++ compiler that links for the target, such as aarch64-linux-gnu-g++."
DOMAIN = "Where zeros are used: the faster of both per layer (auto), one domain only, or nowhere (dense)."
COMPILE_WINOGRAD_SPARSITY = (
    "Share to prune in the Winograd domain of a model that carries no threshold; 0 prunes nothing."
)
TUNING_RECORDS = "Log of auto_scheduler or AutoTVM to apply."
EXPLAIN = "Print for every layer the kernel chosen, its cost and the reason."

EMBED_LIBRARY = "Write MODEL.jsm with the package in it, beside the weights and what is in it already."

PACKAGE = "A package made by jointsparse compile or tvmc compile, or a .jsm file with a library in it."
RUN_TARGET = "Which library of a .jsm file with several: part of its target, or its domain."
INPUTS = ".npz file with the inputs by name; those missing are filled."
OUTPUTS = ".npz file to write the outputs to."
FILL_MODE = "How to fill inputs that are not given."
PRINT_TIME = "Measure and print the time of a run."
REPEAT = "Measurements to take, with --print-time."
NUMBER = "Runs to average in each measurement, with --print-time."

MODEL_TO_BENCH = "Model to measure: .jsm or .onnx."
AGAINST = "Engines to compare with, commas between: onnxruntime, openvino, openvino-bf16, openvino-int8, torch."
THREADS = "Threads of every engine; its process is pinned to as many cores."
ISA = "Instruction set that engines may use: all of this CPU (native) or AVX2."
SECONDS = "Seconds for each measurement, warming up not counted."
