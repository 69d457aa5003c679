import sys
ev=[]
for l in sys.stdin:
    if l.startswith('T '): _,t,n=l.split(); ev.append((int(t),int(n)))
    else: print(l.strip())
ev.sort()
names={100:'raw',110:'normed',120:'gated',200:'delta',300:'up',310:'down'}
d={}; order=[]
# relative to previous event
prev=None
trans={}
# print sequence for DeltaNet layers: from 111 (in waited) with next 202..., gather time offsets from 'in waited'
base=None; acc={}
seq=[]
for t,n in ev:
    seq.append((t,n))
# find layers: pattern: 111 (normed waited) followed later by 202 before next 111
i=0; runs=[]
idx=[k for k,(t,n) in enumerate(seq) if n==111]
for a,b in zip(idx,idx[2:]):
    part=seq[a:b]
    if any(n==202 for t,n in part[:len(part)]) :
        # first 111 must be 'in': 202 occurs before second 111
        second=[k for k in range(a+1,b) if seq[k][1]==111]
        first202=[k for k in range(a,b) if seq[k][1]==202]
        if first202 and second and first202[0]<second[0] and seq[b][0]-seq[a][0]<150000:
            runs.append([(t-seq[a][0],n) for t,n in part]+[(seq[b][0]-seq[a][0],999)])
acc={}
for r in runs:
    cnt={}
    for t,n in r:
        c=cnt.get(n,0); cnt[n]=c+1
        acc.setdefault((n,c),[]).append(t)
for k,v in sorted(acc.items(), key=lambda kv: sorted(kv[1])[len(kv[1])//2]):
    v.sort(); 
    if len(v)>len(runs)//2: print(k, v[len(v)//2], v[len(v)//10], v[len(v)*9//10], len(v))
