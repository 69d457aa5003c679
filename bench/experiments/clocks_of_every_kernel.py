# Reads what clocks_of_every_kernel.patch writes: TRACE=PATH TRACE_WHAT="step,experts" bench_cuda card 40 batch 8 makes PATH.8.step and so on.
# Of each kernel (its file, shared memory, threads, grid) and the one before it: time from its wait to the next one's; then, us after that
# wait was passed by its first block, first / median / last: blocks that let the next start, are ready, pass, and places 3 to 6 and the end.
import sys, collections, statistics as st
from bisect import bisect_left
def load(path):
    R=[]
    for l in open(path):
        f,t,sm,b,sh,th,k,g,y=l.strip().split(',')
        R.append((int(t),f,int(sh),int(th),int(k),int(g),int(b),int(sm),int(y)))
    R.sort()
    insts=[];opened=None
    for r in R:
        if r[4]!=1: continue
        key=(r[1],r[2],r[3],r[5])
        if opened is None or opened['key']!=key or r[0]-opened['p'][0]>200000:
            # late passes: attach to most recent instance of same key if within 30us and its block not seen
            if insts:
                prev=[i for i in insts[-2:-1] if i['key']==key]
                if prev and r[0]-prev[0]['p'][0]<1000*12 and False: pass
            opened={'key':key,'p':[],'ev':collections.defaultdict(list),'sm':collections.Counter()}
            insts.append(opened)
        elif r[0]-opened['p'][-1]>2500 and (r[6],r[8]) in opened['sm']:
            opened={'key':key,'p':[],'ev':collections.defaultdict(list),'sm':collections.Counter()}
            insts.append(opened)
        opened['p'].append(r[0]); opened['sm'][(r[6],r[8])]+=1
    # merge fragments: same key appearing twice within with <5us and other in between short
    bykey=collections.defaultdict(list)
    for i in insts: bykey[i['key']].append(i)
    for k,l in bykey.items(): l.sort(key=lambda i:i['p'][0])
    for r in R:
        if r[4]==1: continue
        key=(r[1],r[2],r[3],r[5]); l=bykey.get(key)
        if not l: continue
        if r[4] in (0,7,6): # before pass
            j=bisect_left([i['p'][-1] for i in l], r[0])
            if r[4]==6: # may be after wait
                j2=bisect_left([i['p'][0] for i in l], r[0])-1
                # choose the closest in time
                c=[x for x in (j,j2) if 0<=x<len(l)]
                j=min(c,key=lambda x:min(abs(l[x]['p'][0]-r[0]),abs(l[x]['p'][-1]-r[0])))
            elif r[4]==7:
                j2=bisect_left([i['p'][0] for i in l], r[0])-1
                c=[x for x in (j,j2) if 0<=x<len(l)]
                if not c: continue
                j=min(c,key=lambda x:min(abs(l[x]['p'][0]-r[0]),abs(l[x]['p'][-1]-r[0])))
        else:
            j=bisect_left([i['p'][0] for i in l], r[0])-1
        if 0<=j<len(l): l[j]['ev'][r[4]].append(r[0])
    insts.sort(key=lambda i:i['p'][0])
    for n,i in enumerate(insts[:-1]): i['dur']=insts[n+1]['p'][0]-i['p'][0]
    return insts
names={7:'start/trig',0:'ready',1:'pass',6:'six',3:'three',4:'four',5:'five',2:'end'}
def summarize(path):
    insts=load(path)
    groups=collections.OrderedDict()
    for n,i in enumerate(insts[:-1]):
        k=(i['key'], insts[n-1]['key'] if n else None)
        groups.setdefault(k,[]).append(i)
    print('==',path.split('/')[-1],'total %.0f us'%((insts[-1]['p'][0]-insts[0]['p'][0])/1e3))
    for k,l in sorted(groups.items(), key=lambda kv:-sum(i['dur'] for i in kv[1])):
        if sum(i['dur'] for i in l)<30000: continue
        print(f"  {sum(i['dur'] for i in l)/1e3:7.0f} us n {len(l)} dur {st.median(i['dur'] for i in l)/1e3:5.2f} {k[0]} after {k[1]}")
        out=[]
        for kind in (7,6,0,1,3,4,5,2):
            vals=[]
            for i in l:
                v=i['p'] if kind==1 else i['ev'].get(kind)
                if v: vals.append((min(v)-i['p'][0],st.median(v)-i['p'][0],max(v)-i['p'][0]))
            if vals: out.append(f"{names[kind]} {st.median(v[0] for v in vals)/1e3:.1f}/{st.median(v[1] for v in vals)/1e3:.1f}/{st.median(v[2] for v in vals)/1e3:.1f}")
        print('        ', '  '.join(out))
for p in sys.argv[1:]: summarize(p)
