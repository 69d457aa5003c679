import sys
ev=[]
for l in sys.stdin:
    if l.startswith('T '): _,t,n=l.split(); ev.append((int(t),n))
    elif l.startswith('step'): print(l.strip())
ev.sort()
# steps end with product index 120 (head); layer counts from ups
layer=None; d={}
prev=None
for t,n in ev:
    k=n
    if n.startswith('product'):
        i=int(n[7:]); 
        if i==120: layer=0; prev=None; continue
        k=['in','out','router'][i%3]; 
        if k=='in' and layer is not None: layer=i//3
    elif n.startswith('delta'): k='delta'
    else: k='up' if n=='experts0' else 'down'
    if layer is not None and prev and t-prev[0]<60000: d.setdefault((prev[1],prev[2]),[]).append(t-prev[0])
    prev=(t,k,layer)
for k in ['in','delta','out','router','up','down']:
    row=[]
    for l in range(40):
        v=sorted(d.get((k,l),[]))
        row.append('%d'%(v[len(v)//2]//10) if v else '-')
    print(k,' '.join(row))
