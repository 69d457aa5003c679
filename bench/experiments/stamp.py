import sys,os
root=sys.argv[1]
def sub(f, pairs):
    f=os.path.join(root,f); s=open(f).read()
    for a,b in pairs:
        assert s.count(a)>=1, (f,a)
        s=s.replace(a,b,1)
    open(f,'w').write(s)
sub('src/backend/cuda/product.cu',[
('#include "backend/fused.h"\n','#include "backend/fused.h"\n#include "backend/cuda/clocks.cuh"\n'),
("    if (!p.conv) let_next_start();\n","    CLOCKS_BEGIN(ROWS == SROWS)\n    int ID = 100 + 10 * (int)(KIND == INPUT_ANY ? p.kind : KIND);\n    STAMP(ID);\n    if (!p.conv) let_next_start();\n"),
("    wait_for_previous();\n    if (p.conv)","    wait_for_previous();\n    STAMP(ID + 1);\n    if (p.conv)"),
("    int number = blockIdx.x, end = 0, format = 0, row_bytes = 0;\n","    STAMP(ID + 2);\n    int number = blockIdx.x, end = 0, format = 0, row_bytes = 0;\n"),
("    if (p.conv && blockIdx.y == 0) advance_conv(p);\n","    STAMP(ID + 3);\n    if (p.conv && blockIdx.y == 0) advance_conv(p);\n"),
("void run(struct queue *q, const char *operation, product_args a)\n{\n","void run(struct queue *q, const char *operation, product_args a)\n{\n    static bool dumps;\n    if (!dumps) dumps = true, atexit(clocks_dump);\n"),
])
sub('src/backend/cuda/product.cu',[
("    if (is<KIND>(p, INPUT_NORMED)) {\n#pragma unroll\n        for (int a = 0; a < N; a++) {\n            float sum = 0;","    CLOCKS_BEGIN(ROWS == SROWS)\n    int ID = 100 + 10 * (int)(KIND == INPUT_ANY ? p.kind : KIND);\n    if (is<KIND>(p, INPUT_NORMED)) {\n#pragma unroll\n        for (int a = 0; a < N; a++) {\n            float sum = 0;"),
("            sum = warp_sum(sum);\n            if (lane == 0) part[a][warp] = sum;\n        }\n        __syncthreads();\n","            if (a == 0 && sum > -1) STAMP(ID + 4);\n            sum = warp_sum(sum);\n            if (lane == 0) part[a][warp] = sum;\n        }\n        __syncthreads();\n        STAMP(ID + 5);\n"),
("    if (!p.quantize) return;\n#pragma unroll\n    for (int a = 0; a < N; a++) {","    STAMP(ID + 6);\n    if (!p.quantize) return;\n#pragma unroll\n    for (int a = 0; a < N; a++) {"),
("                float sum = 0;\n                if (first + b >= rows) continue;\n","                float sum = 0;\n                if (first + b >= rows) continue;\n                { CLOCKS_BEGIN(ROWS == SROWS) if (b == 0 && h == 0 && v[0][0][0].x > -1e30f && gate[1][1][1].y > -1e30f) STAMP(127); }\n"),
])
sub('src/backend/cuda/logged.cu',[
("        if (from == 0 && span.kept > 0 && span.logged)\n","        STAMP(207);\n        if (from == 0 && span.kept > 0 && span.logged)\n"),
("            if (c >= 2 * dk) continue;\n            float *to = c < dk","            if (c >= 2 * dk) continue;\n            if (x[0][0] > -1e30f && x[0][3] > -1e30f) STAMP(208);\n            float *to = c < dk"),

('#include "backend/cuda/device.cuh"\n','#include "backend/cuda/device.cuh"\n#include "backend/cuda/clocks.cuh"\n'),
("    let_next_start();\n    cuda_span span = p.rows.spans[p.first_span","    CLOCKS_BEGIN(true)\n    STAMP(200);\n    let_next_start();\n    cuda_span span = p.rows.spans[p.first_span"),
("    wait_for_previous();\n","    STAMP(201);\n    wait_for_previous();\n    STAMP(202);\n"),
("        __syncthreads();\n        /* all that was read","        __syncthreads();\n        STAMP(203);\n        /* all that was read"),
("        __syncthreads();\n#pragma unroll 1\n        for (int t = 0; t < n; t++) {\n            float k[EACH], q[EACH]","        __syncthreads();\n        STAMP(204);\n#pragma unroll 1\n        for (int t = 0; t < n; t++) {\n            float k[EACH], q[EACH]"),
("            if (last) *arrived = 0;\n        }\n        __syncthreads();\n","            if (last) *arrived = 0;\n        }\n        __syncthreads();\n        STAMP(205);\n"),
("        if (!span.logged && warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];\n}","        if (!span.logged && warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];\n    STAMP(206);\n}"),
("    p.arrived = q->arrived;\n","    p.arrived = q->arrived;\n    static bool dumps;\n    if (!dumps) dumps = true, atexit(clocks_dump);\n"),
])
f=os.path.join(root,'src/backend/cuda/experts_rows.cu')
s=open(f).read()
s=s.replace('#include "backend/cuda/stream.cuh"\n','#include "backend/cuda/stream.cuh"\n#include "backend/cuda/clocks.cuh"\n',1)
i=s.index("__global__ void __launch_bounds__(BLOCK, 2) experts_up_rows"); j=s.index("__global__ void __launch_bounds__(BLOCK, 2) experts_down_rows")
up=s[i:j]; down=s[j:]
b="#if __CUDA_ARCH__ >= 900\n"
up=up.replace(b,b+"    CLOCKS_BEGIN(true)\n    STAMP(300);\n",1)
up=up.replace("    wait_for_previous();\n","    STAMP(301);\n    wait_for_previous();\n    STAMP(302);\n",1)
up=up.replace("        if (first + TOGETHER >= kept_items) return;\n","        if (first + TOGETHER >= kept_items) { STAMP(304); return; }\n",1)
down=down.replace(b,b+"    CLOCKS_BEGIN(true)\n    STAMP(310);\n",1)
down=down.replace("    wait_for_previous();\n","    STAMP(311);\n    wait_for_previous();\n    STAMP(312);\n",1)
down=down.replace("    a.y.data[kept.row * a.y.stride + r] = y;\n","    STAMP(313);\n    a.y.data[kept.row * a.y.stride + r] = y;\n",1)
down=down.replace("    if (!together_args(q, u, d, e, x.rows, p->k, run)) return false;\n    u.x = x;","    if (!together_args(q, u, d, e, x.rows, p->k, run)) return false;\n    static bool dumps;\n    if (!dumps) dumps = true, atexit(clocks_dump);\n    u.x = x;",1)
open(f,'w').write(s[:i]+up+down)
