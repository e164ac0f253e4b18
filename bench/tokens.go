//go:build linux

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/registry"
)

//go:embed tokens.py
var tokensScript []byte

const (
	wayDisk   = "file of the disk, warm"
	wayShm    = "copy on the tmpfs, 4 KiB pages"
	wayAdvise = "onecopy, tmpfs with huge=advise"
)

var tokensView = view{
	part: "tokens", title: "Tokens",
	about: "An unmodified llama.cpp (one thread per worker, greedy, the same tokens in every run) reads its weights from a path. A new process for\n" +
		"each run, because the place of its other memory is luck that must not stay with one way. With more than one worker all generate at\n" +
		"once, and the speed is that of all together. Ratios are those of runs of the same round.",
	columns: []sampleColumn{
		{head: "tokens/s", metric: "tokens_per_s", text: short},
		{head: "tokens/s / disk file", metric: "tokens_per_s", text: ratio3, base: wayDisk, more: true, interval: true},
		{head: "CPU ms per token", metric: "cpu_ms_per_token", text: short},
		{head: "CPU / disk file", metric: "cpu_ms_per_token", text: ratio3, base: wayDisk, interval: true},
		{head: "ready, ms", metric: "ready_ms", text: short},
	},
}

func ratio3(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) + "x" }

func tokensCase(workers int) string {
	if workers == 1 {
		return "1 worker"
	}
	return fmt.Sprintf("%d workers at once", workers)
}

func (s *session) runTokens(ctx context.Context) (err error) {
	libraries, model, why := s.tokensFiles(ctx)
	if why != "" {
		s.note("tokens: skipped: %s", why)
		return nil
	}
	script := filepath.Join(s.work, "tokens.py")
	if err := os.WriteFile(script, tokensScript, 0o600); err != nil {
		return err
	}
	info, err := os.Stat(model)
	if err != nil {
		return err
	}
	// A copy on the disk that is measured, whatever the cache of models lies on.
	source := filepath.Join(s.work, filepath.Base(model))
	if _, err := timed(ctx, "cp", model, source); err != nil {
		return err
	}
	paths, ways := map[string]string{wayDisk: source}, []string{wayDisk, wayShm, wayModel}
	paths[wayShm] = filepath.Join(s.shm, filepath.Base(model))
	if _, err := timed(ctx, "cp", model, paths[wayShm]); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(paths[wayShm])) }()

	dirs := map[string]string{}
	if dirs[wayModel], err = os.MkdirTemp(s.shm, "registry-"); err != nil {
		return err
	}
	mounted, unmount, mountErr := mountAdvise(s.work, 2*info.Size()+64<<20)
	if mountErr != nil {
		s.note("tokens: no row for huge=advise: %v", mountErr)
	} else {
		defer func() { err = errors.Join(err, unmount()) }()
		dirs[wayAdvise] = mounted
		ways = append(ways, wayAdvise)
	}
	for way, dir := range dirs {
		path, leave, loadErr := s.tokensLoad(ctx, dir, source)
		if loadErr != nil {
			return loadErr
		}
		defer func() { err = errors.Join(err, leave()) }()
		paths[way] = path
	}
	source2 := modelFile{path: source, size: info.Size()}
	for _, workers := range s.o.tokenWorkers {
		var check uint64
		err := s.alternate(ctx, "tokens", tokensCase(workers), s.roundsOr(s.o.tokenRounds), ways, func(way string) (values, error) {
			if err := errors.Join(prewarm(256<<20), source2.warm()); err != nil {
				return nil, err
			}
			v, sum, err := s.tokensOnce(ctx, workers, []string{s.python, script, libraries, paths[way], "1", strconv.Itoa(s.o.tokens)})
			if check == 0 {
				check = sum
			}
			if err == nil && sum != check {
				err = errors.New("it generated other tokens than the first run")
			}
			return v, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// tokensFiles finds what scripts/fetch_llama.py and scripts/fetch_model.py fetched.
func (s *session) tokensFiles(ctx context.Context) (libraries, model, why string) {
	if s.python == "" {
		return "", "", "needs Python"
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", "", err.Error()
	}
	libraries, model = s.o.llama, s.o.gguf
	if libraries == "" {
		libraries = filepath.Join(cache, "onecopy", "llama")
	}
	if model == "" {
		found, _ := filepath.Glob(filepath.Join(cache, "onecopy", "models", "smollm2", "*.gguf"))
		if len(found) == 0 {
			return "", "", "no model: run scripts/fetch_model.py smollm2"
		}
		model = found[0]
	}
	if found, _ := filepath.Glob(filepath.Join(libraries, "libllama*.so*")); len(found) == 0 {
		return "", "", "no llama.cpp: run scripts/fetch_llama.py"
	}
	return libraries, model, ""
}

// tokensLoad loads the file and keeps it attached.
func (s *session) tokensLoad(ctx context.Context, dir, source string) (path string, leave func() error, err error) {
	reg, err := registry.Open(dir, nil)
	if err != nil {
		return "", nil, err
	}
	m, err := reg.GetOrLoad(ctx, modelKey, registry.Source{Path: source})
	if err != nil {
		return "", nil, errors.Join(err, reg.Close())
	}
	return filepath.Join(m.Path(), m.Files()[0].Path), func() error { return errors.Join(m.Close(), reg.Close()) }, nil
}

// tokensOnce is one run of so many workers.
func (s *session) tokensOnce(ctx context.Context, workers int, argv []string) (values, uint64, error) {
	begin := monotonic()
	f, err := startFleet(ctx, workers, func() (command, error) { return command{argv: argv}, nil })
	if err != nil {
		return nil, 0, err
	}
	defer f.kill()
	var ready int64
	for _, p := range f {
		rep, err := p.report()
		if err != nil {
			return nil, 0, err
		}
		ready = max(ready, rep.Usable-begin)
	}
	if err := f.tell("go"); err != nil {
		return nil, 0, err
	}
	v := values{"ready_ms": milliseconds(ready)}
	var check uint64
	for i, p := range f {
		var got struct {
			Start, Full, CPU int64
			Check            uint64
		}
		if err := p.next(&got); err != nil {
			return nil, 0, err
		}
		if i > 0 && got.Check != check {
			return nil, 0, p.failed(errors.New("it generated other tokens than the worker beside it"))
		}
		check = got.Check
		v["tokens_per_s"] += float64(s.o.tokens) / (float64(got.Full-got.Start) / 1e9)
		v["cpu_ms_per_token"] += milliseconds(got.CPU) / float64(s.o.tokens*workers)
	}
	return v, check, nil
}

// mountAdvise mounts a tmpfs of its own, which takes root: there the kernel aligns every mapping by itself.
func mountAdvise(parent string, size int64) (dir string, unmount func() error, err error) {
	if dir, err = os.MkdirTemp(parent, "advise-"); err != nil {
		return "", nil, err
	}
	if err := unix.Mount("onecopy-bench", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("huge=advise,mode=0700,size=%d", size)); err != nil {
		return "", nil, errors.Join(os.NewSyscallError("mount", err), os.Remove(dir))
	}
	return dir, func() error {
		if err := unix.Unmount(dir, 0); err != nil {
			return os.NewSyscallError("umount", errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)))
		}
		return os.Remove(dir)
	}, nil
}
