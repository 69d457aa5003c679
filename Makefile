# make                release build, the program is build/quench
# make check          unit tests, kernels, layers, every header alone
# make asan|ubsan|tsan|sanitize   the tests in a build folder of their own; sanitize: ASan and UBSan at once
# make kernels        every operation of every backend and ISA mask against ref
# make emulated       the GPU's kernels, and quantizing, on the CPU (tests/emulator; needs clang, CUDA's headers), FAMILIES="2 4" of them
# make fuzz-NAME      libFuzzer target tests/fuzz/fuzz_NAME.c (needs clang); FUZZ_SECONDS=60, FUZZ_ARGS=; make fuzz: all
# make soak           a server under 10,000 malformed requests, 2,000 clients that leave, 200 SIGTERMs ...: 20 minutes
# make histories      conversations from A to B and back, cached against cold, bit for bit: 2,000; nightly: 100,000
# make bench          the programs under bench/
# make fmt            clang-format in place
# CUDA=0              without GPU kernels (default: with them where nvcc is); CUDA_ARCHS="90a" for these only
# STATIC=1            a binary that needs only libc; WERROR=1 warnings are errors; BUILD=dir another folder

ifeq ($(origin CC),default)
CC      := gcc
endif
comma   := ,
BUILD   ?= build
OPT     ?= -O3
PKGS    := jansson libpcre2-8 libutf8proc yaml-0.1 libedit libpng libjpeg libwebpdemux libwebp libevent_core libevent_extra libevent_pthreads libevent_openssl openssl
COMMIT  := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

WARN    := -Wall -Wextra -Wshadow -Wvla -Wstrict-prototypes -Wmissing-prototypes
CONVERT := -Wconversion -Wno-sign-conversion
ifeq ($(WERROR),1)
WARN    += -Werror
endif
CFLAGS  ?= $(OPT) -g
override CFLAGS += -std=c17 -D_GNU_SOURCE -Isrc $(WARN) $(SAN) -MMD -MP -fno-math-errno \
                   -ffp-contract=off $(shell pkg-config --cflags $(PKGS))
LDFLAGS += $(SAN) -pthread
ifeq ($(STATIC),1)
LDLIBS  := -Wl,-Bstatic -ljansson -lpcre2-8 -lutf8proc -lyaml -ledit -ltinfo -lbsd -lmd -lpng16 -ljpeg -lwebpdemux -lwebp -lgif -lz -levent_openssl -levent_pthreads -levent_extra -levent_core -lssl -lcrypto -Wl,-Bdynamic -lm
else
LDLIBS  := $(shell pkg-config --libs $(PKGS)) -lgif -lm
endif

NVCC    ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA    ?= $(if $(NVCC),1,0)
CUDA_ARCHS ?= 80 86 89 90a 100a 120a
SRC     := $(wildcard src/*/*.c src/*/*/*.c)
ifeq ($(CUDA),1)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(lastword $(NVCC))))
CUDASRC := $(wildcard src/backend/cuda/*.cu)
override CFLAGS += -DQUENCH_CUDA -isystem $(CUDA_HOME)/include
LDLIBS  += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lpthread
else
SRC     := $(filter-out src/backend/cuda/%,$(SRC))
endif
OBJ     := $(SRC:%.c=$(BUILD)/%.o) $(CUDASRC:%.cu=$(BUILD)/%.cu.o)
LIB     := $(BUILD)/libquench.a
PROGRAM := $(BUILD)/src/cli/main.o $(BUILD)/src/cli/version.o
LIBOBJ  := $(filter-out $(PROGRAM),$(OBJ))
HDR     := $(wildcard src/*/*.h src/*/*/*.h)
ifneq ($(CUDA),1)
HDR     := $(filter-out src/backend/cuda/%,$(HDR))
endif
# The longest first: no processor waits long for the last one.
LONGEST := $(addprefix tests/,backend/test_kernels engine/test_speculation server/test_parameters server/test_serve server/test_faults quantize/test_resume engine/test_scheduler)
TESTS   := $(addprefix $(BUILD)/,$(LONGEST) $(filter-out $(LONGEST),$(basename $(wildcard tests/*/test_*.c))))
BENCHES := $(patsubst %.c,$(BUILD)/%,$(wildcard bench/*.c))
ifneq ($(CUDA),1)
BENCHES := $(filter-out %/bench_cuda,$(BENCHES))
endif
TESTOBJ := $(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/support/*.c))
TESTLIB := $(BUILD)/libtests.a
$(TESTOBJ): override CFLAGS += -Itests
FUZZ_SECONDS ?= 60

all: $(BUILD)/quench

$(BUILD)/quench: $(PROGRAM) $(LIB)
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(LIB): $(LIBOBJ)
	rm -f $@ && $(AR) rcs $@ $^

# Kernels: one file per ISA, with the flags its name asks for, on x86-64; elsewhere all are the generic ones. ref
# keeps one meaning everywhere.
X86     := $(findstring x86_64,$(shell $(CC) -dumpmachine))
$(BUILD)/src/backend/cpu/kernels_generic.o: ISA := -ffp-contract=fast
$(BUILD)/src/backend/cpu/kernels_avx2.o:    ISA := -ffp-contract=fast -mavx2 -mfma -mf16c
$(BUILD)/src/backend/cpu/kernels_avx512.o:  ISA := -ffp-contract=fast -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512
$(BUILD)/src/backend/cpu/kernels_avx512bf16.o $(BUILD)/src/backend/cpu/kernels_zen5.o: ISA := -ffp-contract=fast -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mavx512vbmi -mfma -mf16c -mprefer-vector-width=512
$(BUILD)/src/backend/cpu/kernels_amx.o: ISA := -ffp-contract=fast -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mavx512vbmi -mfma -mf16c -mamx-tile -mamx-int8 -mamx-bf16 -mprefer-vector-width=512
# `make sanitize` has UBSan look at the generic ones only: the others are mostly of the same source, and take eight times as long
# with it. `make ubsan` looks at all.
$(patsubst %,$(BUILD)/src/backend/cpu/kernels_%.o,avx2 avx512 avx512bf16 zen5 amx): ISA += $(if $(findstring address$(comma)undefined,$(SAN)),-fno-sanitize=undefined)
# The row kernels of packing likewise, but never contracted: every set writes the same bytes.
$(BUILD)/src/num/rows_avx2.o: ISA := -mavx2
$(BUILD)/src/base/%.o $(BUILD)/src/num/%.o $(BUILD)/src/checkpoint/%.o $(BUILD)/src/tokenizer/%.o $(BUILD)/src/image/%.o $(BUILD)/src/grammar/%.o $(BUILD)/src/server/%.o: STRICT := $(CONVERT)
$(BUILD)/src/tokenizer/chat.o: models/demo/chat_template.jinja
$(BUILD)/src/server/page.o: src/server/page/page.html
# A new commit is a new version, and nothing else.
$(BUILD)/commit: always
	@mkdir -p $(@D)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' >$@
$(BUILD)/src/cli/version.o: $(BUILD)/commit
$(BUILD)/src/cli/version.o: override CFLAGS += -DQUENCH_COMMIT='"$(COMMIT)"'

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(STRICT) $(if $(X86),$(ISA),$(filter-out -m%,$(ISA))) -c -o $@ $<

# -fmad=false: a product and a sum are one rounding only where fmaf says so, whatever the compiler inlines.
$(BUILD)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) -std=c++17 -O3 -fmad=false -lineinfo -Isrc -MD -MP -MF $(@:.o=.d) -Xcompiler -fno-exceptions,-fno-rtti,-fno-threadsafe-statics \
	    $(foreach a,$(CUDA_ARCHS),-gencode=arch=compute_$(a),code=sm_$(a)) -c -o $@ $<

$(TESTLIB): $(TESTOBJ)
	rm -f $@ && $(AR) rcs $@ $^

$(BUILD)/tests/%: tests/%.c $(TESTLIB) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Itests $(LDFLAGS) -o $@ $< $(TESTLIB) $(LIB) $(LDLIBS) -lcmocka

$(BUILD)/bench/%: bench/%.c $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $(filter-out $(LIB),$^) $(LIB) $(LDLIBS)

check: all layers headers bench test

test: $(TESTS) all
	BUILD=$(BUILD) tools/run_tests.sh $(TESTS)

# DEVICE=cuda: of the GPU instead
kernels: $(BUILD)/tests/backend/test_kernels
	QUENCH_DEVICE=$(DEVICE) $<

memcheck: $(BUILD)/tests/backend/test_kernels
	for tool in memcheck racecheck synccheck; do QUENCH_DEVICE=cuda compute-sanitizer --tool $$tool $< || exit 1; done

# Kernels as C++ of the CPU, which ASan watches, in place of those that nvcc makes; the rest is as it was built.
ifeq ($(CUDA),1)
CXX_EMULATED := clang++ -std=c++17 -O1 -g -MMD -MP -Itests/emulator -Isrc -isystem $(CUDA_HOME)/include -include emulator.h \
                -ffp-contract=off -mavx2 -mfma -fno-exceptions -fno-rtti -fno-omit-frame-pointer
EMULATED := $(CUDASRC:%.cu=$(BUILD)/emulated/%.o)
EMULATOR := $(patsubst %.cpp,$(BUILD)/%.o,$(filter-out %/first.cpp %/last.cpp,$(wildcard tests/emulator/*.cpp)))
FAMILIES ?= 0 1 2 3 4 5 6 7 8 9 10 11 12 13 15 16 quantize
emulated: $(FAMILIES:%=emulated-%)
emulated-quantize: $(BUILD)/emulated/tests/quantize/test_device
	@QUENCH_DEVICE=cuda $< >$<.log 2>&1 && echo "emulated: calibrates and packs as the CPU does" || { cat $<.log; exit 1; }
emulated-%: $(BUILD)/emulated/tests/backend/test_kernels
	@QUENCH_DEVICE=cuda QUENCH_FAMILY=$* $< >$<-$*.log 2>&1 && echo "emulated: family $* agrees with ref" || { cat $<-$*.log; exit 1; }
$(BUILD)/emulated/%.o: %.cu
	@mkdir -p $(@D)
	$(CXX_EMULATED) -w -mllvm -pragma-unroll-threshold=1 -fsanitize=address,alignment -fno-sanitize-recover=all -x c++ -c -o $@ $<
$(BUILD)/tests/emulator/%.o: tests/emulator/%.cpp
	@mkdir -p $(@D)
	$(CXX_EMULATED) -Wall -Wextra -O3 -c -o $@ $<
# Static shared memory lies between the first and the last.
$(BUILD)/emulated/tests/%: $(BUILD)/tests/emulator/first.o $(BUILD)/emulated/tests/%.o $(EMULATOR) $(EMULATED) $(filter-out %.cu.o $(BUILD)/src/cli/%,$(LIBOBJ)) $(TESTLIB) $(BUILD)/tests/emulator/last.o
	clang++ -fsanitize=address,undefined -o $@ $^ $(filter-out -lcudart_static,$(LDLIBS)) -lcmocka -pthread
$(BUILD)/emulated/tests/%.o: tests/%.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -Itests -c -o $@ $<
else
emulated:
	@echo "SKIP: kernels on the CPU: no CUDA headers"
endif

# About half a second each on two cores.
HISTORIES ?= 2000
histories: $(BUILD)/tests/engine/test_histories
	$< $(HISTORIES) $(SEED)
nightly:
	$(MAKE) histories HISTORIES=100000 SEED=$$(date +%Y%m%d)

layers:
	tools/layers.sh

headers: $(HDR:%=$(BUILD)/%.alone)
$(BUILD)/%.h.alone: %.h
	@mkdir -p $(@D)
	$(CC) $(filter-out -MMD -MP,$(CFLAGS)) -Wno-unused-function -fsyntax-only -x c $< && touch $@

# Its allocations can be made to fail.
$(BUILD)/tests/grammar/test_memory: LDFLAGS += -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=strdup,--wrap=strndup

# Name servers can be made to say nothing.
$(BUILD)/tests/server/test_fetch: LDFLAGS += -Wl,--wrap=getaddrinfo

soak: $(BUILD)/tests/server/test_serve $(BUILD)/tests/server/test_faults all
	BUILD=$(BUILD) QUENCH_KEYS=1 $(BUILD)/tests/server/test_serve
	BUILD=$(BUILD) QUENCH_MALFORMED=10000 QUENCH_DISCONNECTS=2000 QUENCH_SLOW=1000 QUENCH_SIGTERMS=200 $(BUILD)/tests/server/test_faults

# The tests that run threads, under TSan; the others hold none.
THREADED := tests/base/test_pool tests/checkpoint/test_checkpoint tests/backend/test_kernels tests/model/test_golden tests/engine/test_scheduler tests/engine/test_encoder_cache tests/engine/test_disk_cache tests/server/test_fetch tests/server/test_admin
# -g1: they print lines, and all of -g takes a compiler longer than the rest.
SAN_asan  := -fsanitize=address -fno-omit-frame-pointer
SAN_ubsan := -fsanitize=undefined -fno-sanitize-recover=all
SAN_tsan  := -fsanitize=thread
SAN_sanitize := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
asan ubsan tsan sanitize:
	$(MAKE) BUILD=build-$@ SAN="-g1 $(SAN_$@)" OPT=-O1 test
tsan-threads:
	$(MAKE) BUILD=build-tsan SAN="-g1 $(SAN_tsan)" OPT=-O1 $(THREADED:%=build-tsan/%) build-tsan/quench build-tsan/tests/server/test_faults
	BUILD=build-tsan tools/run_tests.sh $(THREADED:%=build-tsan/%)
	BUILD=build-tsan QUENCH_ONLY=test_disconnects build-tsan/tests/server/test_faults

# One instrumented library for all targets: what parses.
SAN_fuzz := address,undefined -fno-sanitize-recover=all
FUZZED   := $(filter src/base/% src/num/% src/checkpoint/% src/tokenizer/% src/image/% src/grammar/% src/server/% src/engine/sample% src/quantize/recipe% src/quantize/yaml%,$(SRC))
$(BUILD)/libparsers.a: $(FUZZED:%.c=$(BUILD)/%.o)
	rm -f $@ && $(AR) rcs $@ $^
fuzz-lib:
	$(MAKE) BUILD=build-fuzz CC=clang OPT=-O1 CUDA=0 SAN="-fsanitize=fuzzer-no-link,$(SAN_fuzz)" build-fuzz/libparsers.a
fuzz-%: tests/fuzz/fuzz_%.c fuzz-lib
	@mkdir -p build-fuzz/corpus-$*
	clang $(filter-out -MMD -MP -DQUENCH_CUDA,$(CFLAGS)) -O1 -fsanitize=fuzzer,$(SAN_fuzz) -pthread -o build-fuzz/fuzz_$* $< build-fuzz/libparsers.a \
	    $(filter-out -lcudart_static,$(LDLIBS))
	build-fuzz/fuzz_$* -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build-fuzz/ $(FUZZ_ARGS) \
	    build-fuzz/corpus-$* $(wildcard tests/fuzz/seeds-$*)

fuzz: $(patsubst tests/fuzz/fuzz_%.c,fuzz-log-%,$(wildcard tests/fuzz/fuzz_*.c))
fuzz-log-%: fuzz-lib
	@mkdir -p build-fuzz
	@$(MAKE) fuzz-$* >build-fuzz/$*.log 2>&1 || { tail -n 40 build-fuzz/$*.log; exit 1; }
	@echo "fuzz-$*: $$(grep -E 'executed_units|peak_rss' build-fuzz/$*.log | tr -s ' \n' ' ')"

bench: $(BENCHES)

fmt:
	clang-format -i $(FORMATTED)

FORMATTED := $(wildcard src/*/*.[ch] src/*/*/*.[ch] tests/*/*.[ch] bench/*.[ch])
fmt-check:
	@case "$$(clang-format --version)" in \
	*"version 14."*) clang-format --dry-run -Werror $(FORMATTED) && echo "formatting: clean" ;; \
	*) echo "SKIP: formatting: versions of clang-format differ, the tree is formatted by 14" ;; \
	esac

clean:
	rm -rf build build-*

.PHONY: always all check test soak fmt-check tsan-threads kernels emulated histories nightly memcheck layers headers asan ubsan tsan sanitize fuzz fuzz-lib bench fmt clean
-include $(EMULATED:.o=.d) $(EMULATOR:.o=.d) $(wildcard $(BUILD)/emulated/tests/*/*.d) $(OBJ:.o=.d) $(TESTS:=.d) $(BENCHES:=.d) $(TESTOBJ:.o=.d)
