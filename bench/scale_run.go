//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cpuOf is the processor time of a whole process, with its threads that have ended.
func cpuOf(pid int) (int64, error) {
	var ts unix.Timespec
	// What clock_getcpuclockid makes of a pid: CPUCLOCK_SCHED of all threads.
	err := unix.ClockGettime(int32(^pid<<3|2), &ts)
	return ts.Nano(), os.NewSyscallError("clock_gettime", err)
}

// meter is the processor time that a process takes between two moments.
type meter struct {
	pid       int
	cpu, wall int64
}

func startMeter(pid int) (m meter, err error) {
	m = meter{pid: pid, wall: monotonic()}
	m.cpu, err = cpuOf(pid)
	return m, err
}

// read is what was used since the start, for each of n steps.
func (m meter) read(n int) (values, error) {
	cpu, err := cpuOf(m.pid)
	wall := monotonic() - m.wall
	return values{
		"cpu_ms":        milliseconds(cpu-m.cpu) / float64(n),
		"share_percent": 100 * float64(cpu-m.cpu) / float64(wall),
		"interval_ms":   milliseconds(wall) / float64(n),
	}, err
}

// scrapes starts a server of metrics and asks it as Prometheus does, over one connection.
func scrapes(ctx context.Context, argv []string) (v values, err error) {
	const times = 10
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = cmd.Process.Kill() // it serves until then
		_ = cmd.Wait()
	}()
	line, err := bufio.NewReader(stderr).ReadString('\n')
	if err != nil {
		return nil, err
	}
	_, url, ok := strings.Cut(strings.TrimSpace(line), "serving ")
	if !ok {
		return nil, fmt.Errorf("it said %q", line)
	}
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	var took []float64
	m, err := startMeter(cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	for range times {
		begin := monotonic()
		if err := scrape(ctx, client, url); err != nil {
			return nil, err
		}
		took = append(took, milliseconds(monotonic()-begin))
	}
	used, err := m.read(times)
	return values{"wall_ms": median(sorted(took)), "cpu_ms": used["cpu_ms"]}, err
}

func scrape(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || !bytes.Contains(text, []byte("onecopy_up 1"))) {
		err = fmt.Errorf("%s: %s: %.200s", url, res.Status, text)
	}
	return err
}

// topStream measures top from its first document on.
func (s *session) topStream(ctx context.Context, argv []string) (values, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = cmd.Process.Kill() // it goes on until then
		_ = cmd.Wait()
	}()
	lines := bufio.NewReader(stdout)
	if _, err := lines.ReadBytes('\n'); err != nil {
		return nil, fmt.Errorf("%w: %s", err, &stderr)
	}
	m, err := startMeter(cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	for range s.o.refreshes {
		if _, err := lines.ReadBytes('\n'); err != nil {
			return nil, err
		}
	}
	v, err := m.read(s.o.refreshes)
	if err == nil {
		v["refresh_percent"] = 100 * v["cpu_ms"] / milliseconds(int64(topInterval))
	}
	return v, err
}

// topTerminal measures top on a terminal, as a person leaves it running.
func (s *session) topTerminal(ctx context.Context, argv []string) (v values, err error) {
	screen, tty, err := openTerminal()
	if err != nil {
		return nil, err
	}
	defer screen.Close()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.Env = append(os.Environ(), "TERM=xterm-256color")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	tty.Close()
	if err != nil {
		return nil, err
	}
	drawn := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		seen := false
		buf := make([]byte, 64<<10)
		var text []byte
		for {
			n, err := screen.Read(buf)
			if !seen {
				if text = append(text, buf[:n]...); bytes.Contains(text, []byte("used of a budget")) {
					seen = true
					close(drawn)
				}
			}
			if err != nil { // EIO: nobody has the terminal open any more
				ended <- fmt.Errorf("%w: it showed %.300q", cmd.Wait(), text)
				return
			}
		}
	}()
	select {
	case <-drawn:
	case err := <-ended:
		return nil, err
	}
	m, err := startMeter(cmd.Process.Pid)
	if err == nil {
		interval := s.o.interval
		if interval == 0 {
			interval = topInterval
		}
		select {
		case <-time.After(time.Duration(s.o.refreshes) * interval):
			v, err = m.read(s.o.refreshes)
			delete(v, "interval_ms") // how often it was drawn is not known
			delete(v, "cpu_ms")
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	_ = cmd.Process.Kill() // how it ends is the tests' business
	<-ended
	return v, err
}

// topInterval is the default of shmctl top.
const topInterval = 2 * time.Second

// openTerminal makes a pseudo-terminal of 200 columns and 50 lines.
func openTerminal() (screen, tty *os.File, err error) {
	screen, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(screen.Fd())
	err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	n := 0
	if err == nil {
		n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 200})
	}
	if err == nil {
		tty, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		screen.Close()
		return nil, nil, err
	}
	return screen, tty, nil
}
